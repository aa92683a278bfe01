"""Tools that several test files share; tutorials/development.md has a line on each file."""
