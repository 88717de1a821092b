"""Numbers about routing: the six-word example, drop rates, traffic, specialisation, parity."""
