"""What a bundle costs on this machine: time, memory, and how near both come to the machine's limits."""
