"""Everything that turns a training checkpoint into a bundle the service can load."""
