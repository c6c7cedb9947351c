"""A file a family, as data: which architectures, config.json to spec, names of weights."""
