"""virtio vocabulary, shared by guest and host. No behaviour."""
