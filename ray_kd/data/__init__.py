"""Records -> packed rows on disk: sources read, formats say what is trained, prepare tokenises and packs once."""
