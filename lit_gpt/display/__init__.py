"""How results are shown to people: tables and figures."""
