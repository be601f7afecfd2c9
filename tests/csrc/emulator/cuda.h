#pragma once
#include "emulator.hpp"

struct CUtensorMap {};
