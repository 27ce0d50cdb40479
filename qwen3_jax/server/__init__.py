"""An OpenAI-compatible HTTP server over the engine.

socket → `protocol` (times and sizes of the wire) → `access` (request ids, the log) → `auth` → `limits` → a route
(`chat`, `completions`, `responses`, …) → `body` and `schema` (JSON, checked) → `serving` (template, tokenizer, engine)
→ `answering` and `generation` (updates as they come) → JSON or server-sent events.
"""
