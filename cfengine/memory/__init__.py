"""What a session remembers: pages hold bytes, policies decide which page sits where."""
