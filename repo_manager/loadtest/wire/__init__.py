"""The two wire clients: prebuilt requests on non-blocking sockets."""
