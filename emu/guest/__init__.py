"""The guest kernel: Linux's words, constants and behaviour, in Python, over memory that is a guest's.

Deterministic and single-threaded. It reaches memory only through the `GuestMemory` protocol, so that it runs on a
`GuestRam` for real and on a bytearray in unit tests. Each place that deviates from Linux says so. Where kernel versions
differ, it is 6.1: that is what the recorded guest ran, by which it is checked.
"""
