"""Next-element prediction with a known optimum: which mixer learns what, and at what cost."""
