"""What FLASHRL_CONFIG and the environment may say, and where the files they name are found."""
