"""The load generator behind `jaxserve bench serve`."""
