"""Go clip's files: its gob bodies, its header, its nodes, read and written."""
