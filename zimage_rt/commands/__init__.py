"""The subcommands of `zimage-rt`, a file each."""
