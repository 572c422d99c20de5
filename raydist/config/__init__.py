"""Typed configuration: strict schema, YAML overlays, ``key.sub=value``, choices by name."""
