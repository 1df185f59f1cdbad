"""Makes the runtime known to engines, and unknown again: their configuration files are merged with, never replaced."""
