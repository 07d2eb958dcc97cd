"""Files: reading at any place, writing that keeps the old file until the new one is whole, threads."""
