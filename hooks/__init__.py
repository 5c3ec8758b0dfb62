"""The plugin face: hook specifications and thin built-in implementations."""
