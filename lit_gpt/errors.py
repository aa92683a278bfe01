class InputError(Exception):
    """Something the user can mend: a file, a flag, a record. `cli.run` prints it as one line and exits with status 2.

    The text says what was found, what was expected and what to type next. Bugs are any other exception: they keep
    their traceback.
    """
