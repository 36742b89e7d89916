"""``python -m eigendamage``."""

from eigendamage.cli import main

main()
