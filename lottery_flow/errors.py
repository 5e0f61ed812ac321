"""The exception for mistakes that a user can mend."""


class UserError(Exception):
    """A wrong input, told in one sentence: the field, the value, the remedy.

    `lottery_flow.main` prints it without a traceback and exits with status 2;
    every other exception is a defect of ours and keeps its traceback.
    """


class DiskError(UserError):
    """The disk takes no more.

    Threads of orbax may wait minutes for what others of them could not write, so the
    command does not wait for them when it ends.
    """
