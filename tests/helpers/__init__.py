"""What several tests use: small models, folders, scripts. No test imports another test."""

import os

FULL = bool(os.environ.get("PASTA_FULL"))
"""Full counts, as continuous integration runs them."""
