// What the C++ tests assert with.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                \
        }                                                                           \
    } while (false)

// The statement throws this type.
#define CHECK_THROWS(Type, statement)                                                                \
    do {                                                                                             \
        bool thrown = false;                                                                         \
        try {                                                                                        \
            statement;                                                                               \
        } catch (const Type&) {                                                                      \
            thrown = true;                                                                           \
        }                                                                                            \
        if (!thrown) {                                                                               \
            fprintf(stderr, "%s:%d: did not throw %s: %s\n", __FILE__, __LINE__, #Type, #statement); \
            exit(1);                                                                                 \
        }                                                                                            \
    } while (false)
