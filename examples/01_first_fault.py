"""A frame comes into being when it is written, not when it is mapped or read.

Prints:

    mapped       0 frames resident   0 faults
    read         0 frames resident   1 faults   reads as b'\\x00\\x00\\x00\\x00'
    written      1 frames resident   2 faults   reads as b'page'
    again        1 frames resident   2 faults   reads as b'page'
    a gigabyte   0 MiB, then 3 frames of 262144
"""

import emu


def show(what: str, ram: emu.GuestRam, gpa: int | None = None) -> None:
    content = "" if gpa is None else f"   reads as {ram.read(gpa, 4)!r}"
    faults = ram.stats()["pgfault"]
    print(f"{what:<11}  {ram.rss_bytes // 4096} frames resident   {faults} faults{content}")


def main() -> None:
    with emu.GuestRam("1MiB") as ram:
        show("mapped", ram)
        ram.touch(5, write=False)  # maps the shared zero page: costs no memory
        show("read", ram, 5 * 4096)
        ram.write(7 * 4096, b"page")  # a page of its own at once
        show("written", ram, 7 * 4096)
        ram.write(7 * 4096, b"page")
        show("again", ram, 7 * 4096)

    with emu.GuestRam("1GiB") as ram:
        print(f"a gigabyte   {ram.rss_bytes >> 20} MiB,", end=" ")
        ram.touch(1000, 3)
        print(f"then {ram.rss_bytes // 4096} frames of {ram.frames}")


if __name__ == "__main__":
    main()
