"""Where the engine is owned: answers that are wanted, a queue that takes turns, the threads that work."""
