"""What every floor above needs: files, figures, memory, checked arguments, names of outputs."""
