"""What holds a child to the memory, time and storage of a device, on whatever host this is."""
