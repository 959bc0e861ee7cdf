/* Codes of the actions that the samples push. `cfengine serve` maps them to what its model calls them. */
#ifndef CFENGINE_ACTIONS_H
#define CFENGINE_ACTIONS_H

enum {
    CF_ACTION_TURN = 1 /* value -1: the camera turns left, 1: right, 0: it goes straight on */
};

#endif
