"""Configuration: the schema, the request checks that run before torch is imported, and the YAML values."""
