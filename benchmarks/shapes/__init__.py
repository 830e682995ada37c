"""Experiments in the little world of `modeling_frozen.shapes`: what several pictures, films, languages and shots come to."""
