def attend_mixed(q, out, kv_pages, pages, layer, *, spec, backend, sinks=None):
    return out
