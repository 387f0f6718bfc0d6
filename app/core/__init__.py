"""What every stage uses: configuration, run root, files. No torch here."""
