"""Starting roles: the programs behind `understudy run` and `understudy demo`, and role scripts."""
