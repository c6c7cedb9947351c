"""Makes it run: device state, shape buckets, the jitted step, sampling, compiling."""
