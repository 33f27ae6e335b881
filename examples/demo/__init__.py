"""The demo: ten classes of real photographs, a small network, a minute of training, one picture."""

import os

# Albumentations asks a server for its newest version when it is imported. The demo asks nobody for anything.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
