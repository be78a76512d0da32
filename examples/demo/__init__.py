"""The main job, end to end: pack images, train, be killed, resume exactly, and prove it."""
