"""The demo: ten classes of real photographs, a small network, a minute of training, one picture."""

import os

# Albumentations asks a server for its latest version when it is imported. The demo uses no network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
