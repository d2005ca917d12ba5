"""What the two commands share: errors as one line, exit statuses, option types, progress on stderr."""
