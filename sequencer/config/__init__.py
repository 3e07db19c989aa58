"""What may be asked for: the schema, the checks of a request, and sweeps. Imports neither torch nor timm."""
