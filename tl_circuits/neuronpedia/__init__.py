"""Neuronpedia, circuit-tracer and llamascopium: graphs in and out, labels, uploads, feature files."""
