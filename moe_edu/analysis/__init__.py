"""Numbers about routing: the example of six words, drop rates, traffic, specialisation, parity."""
