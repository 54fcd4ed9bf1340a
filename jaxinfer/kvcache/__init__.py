"""Pages of keys and values: the pool on the device, the allocator and the prefix tree on the host."""
