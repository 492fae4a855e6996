"""The host: what serves the guest's memory and takes it back. Talks to the guest through virtio's vocabulary only."""
