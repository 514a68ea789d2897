"""The teacher's encoder and decoder states on disk: layout, store, builder, reader and policy."""
