#pragma once
#include "emulator.hpp"
