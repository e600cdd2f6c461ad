"""Files, URLs and limits for untrusted input."""
