// Choice of an instruction set at run time.
//
// Every kernel is compiled once per level, each time into its own namespace l0 ... l3; CF_DISPATCH builds the table of
// those copies and calls the one for the level in force. Level 0 is portable code, the others are x86-64.
#pragma once

#include <string>
#include <vector>

namespace cf {

int level();                                // the level in force: the best that is built and that the machine can run
void set_level(const std::string& name);    // force another (tests); throws cf::Error naming what is possible
std::string level_name();
std::vector<std::string> usable_levels();   // worst first

}  // namespace cf

#if defined(CF_HAS_LEVEL_1)
#define CF_ENTRY_1(op) l1::op
#else
#define CF_ENTRY_1(op) nullptr
#endif
#if defined(CF_HAS_LEVEL_2)
#define CF_ENTRY_2(op) l2::op
#else
#define CF_ENTRY_2(op) nullptr
#endif
#if defined(CF_HAS_LEVEL_3)
#define CF_ENTRY_3(op) l3::op
#else
#define CF_ENTRY_3(op) nullptr
#endif

// Defines cf::op(const Args&), which calls the copy for the level in force. Use it in the level 0 copy only.
#define CF_DISPATCH(op, Args)                                                                               \
    namespace cf {                                                                                          \
    namespace l1 { void op(const Args&); }                                                                  \
    namespace l2 { void op(const Args&); }                                                                  \
    namespace l3 { void op(const Args&); }                                                                  \
    static void op(const Args& args) {                                                                      \
        static void (*const table[])(const Args&) = {l0::op, CF_ENTRY_1(op), CF_ENTRY_2(op), CF_ENTRY_3(op)}; \
        table[level()](args);                                                                               \
    }                                                                                                       \
    }
