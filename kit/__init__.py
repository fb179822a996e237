"""What any detector needs, one subject a file; nothing in here knows the method."""
