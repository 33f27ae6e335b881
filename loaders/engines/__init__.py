"""Engines turn orders into filled slots: in this thread, in threads, or in worker processes."""
