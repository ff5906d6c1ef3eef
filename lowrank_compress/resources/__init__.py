"""What a process may use, memory, threads and other processes; nothing of it changes a result."""
