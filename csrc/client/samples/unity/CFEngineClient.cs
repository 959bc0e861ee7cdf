// cfengine_client.h for C#: the same structures, constants and functions, on 64-bit systems. No UnityEngine here.
//
// Calls take structures by reference and allocate nothing. CFEngineSession.cs is easier to use.
using System;
using System.Runtime.InteropServices;

namespace CFEngine
{
    public enum CfResult
    {
        Success = 0,
        NotReady = 1,
        ErrorInvalidArgument = -1,
        ErrorVersion = -2,
        ErrorNotFound = -3,
        ErrorAccess = -4,
        ErrorBadRing = -5,
        ErrorTooManyReaders = -6,
        ErrorFrameHeld = -7,
        ErrorNotHeld = -8,
        ErrorLeaseLost = -9,
        ErrorQueueFull = -10,
        ErrorTooLong = -11,
        ErrorBusy = -12,
        ErrorOutOfMemory = -13,
        ErrorSystem = -14,
        ErrorMemoryKind = -15,
        ErrorTimeout = -16,
        ErrorUnsupported = -17
    }

    public enum CfStructType : uint
    {
        Version = 1,
        SessionInfo = 2,
        SessionState = 3,
        AcquireInfo = 4,
        Frame = 5,
        Event = 6,
        Stats = 7,
        DeviceMemory = 8
    }

    public enum CfState : uint { Loading = 1, Ready = 2, Running = 3, Paused = 4, Stalled = 5, Error = 6, Ended = 7 }

    public enum CfFormat : uint { Rgba8 = 1, Nv12 = 2 }

    public enum CfMemory : uint { Host = 1, CudaIpc = 2, OpaqueFd = 3 }

    [Flags]
    public enum CfSessionFlags : uint { DeviceMemory = 1 }

    public enum CfPolicy : uint { Latest = 0, Next = 1, Nearest = 2 }

    [Flags]
    public enum CfFrameFlags : uint { Repeated = 1, Discontinuity = 2, Late = 4 }

    public enum CfEventKind : uint { Prompt = 1, Action = 2, Pose = 3, Pause = 4, Resume = 5, Reset = 6 }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfHeader
    {
        public uint StructSize;
        public CfStructType StructType;
        public IntPtr Next;

        public static CfHeader Of<T>(CfStructType type) where T : struct
        {
            return new CfHeader { StructSize = (uint)Marshal.SizeOf<T>(), StructType = type };
        }
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfVersion
    {
        public CfHeader Header;
        public uint Major, Minor, RingMajor, RingMinor;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfSessionInfo
    {
        public CfHeader Header;
        public IntPtr Name; // UTF-8, ends with a zero
        public long LeaseNs;
        public CfSessionFlags Flags; // this binding reads host memory and leaves them 0
        public uint Reserved;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfSessionState
    {
        public CfHeader Header;
        public CfState State;
        public uint WriterAlive;
        public ulong Generation;
        public long HeartbeatNs;
        public ulong NewestId;
        public CfFormat Format;
        public CfMemory Memory;
        public uint Width, Height, FpsNumerator, FpsDenominator, Slots, Readers;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfAcquireInfo
    {
        public CfHeader Header;
        public long DisplayTimeNs, TimeoutNs;
        public CfPolicy Policy;
        public uint Reserved;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfPlane
    {
        public IntPtr Data;
        public ulong Stride, Size;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfPlanes // cf_plane[2]
    {
        public CfPlane First, Second;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfOffsets // uint64_t[2]
    {
        public ulong First, Second;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfFrame
    {
        public CfHeader Header;
        public ulong Id, Generation;
        public long PtsNs, ReadyNs;
        public ulong ChunkIndex, LastEventId, AppliedAtChunk;
        public CfFrameFlags Flags;
        public CfFormat Format;
        public CfMemory Memory;
        public uint Width, Height, PlaneCount;
        public CfPlanes Planes;
        public CfOffsets Offsets;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfUuid // uint8_t[16]
    {
        public ulong Low, High;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfIpcHandle // uint8_t[64]
    {
        public ulong A, B, C, D, E, F, G, H;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfDeviceMemory
    {
        public CfHeader Header;
        public ulong Generation, Size, FrameStride;
        public uint Slots;
        public CfMemory Memory;
        public CfUuid DeviceUuid;
        public int Fd;
        public uint Reserved;
        public CfIpcHandle IpcHandle;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfPrompt
    {
        public IntPtr Utf8;
        public uint Bytes;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfAction
    {
        public uint Code;
        public double Value;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfPosition // float[3]: metres right, up, back
    {
        public float X, Y, Z;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfOrientation // float[4]: unit quaternion
    {
        public float X, Y, Z, W;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfPose
    {
        public CfPosition Position;
        public CfOrientation Orientation;
        public long TimeNs;
    }

    [StructLayout(LayoutKind.Explicit)]
    public struct CfEventValue // the union
    {
        [FieldOffset(0)] public CfPrompt Prompt;
        [FieldOffset(0)] public CfAction Action;
        [FieldOffset(0)] public CfPose Pose;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfEvent
    {
        public CfHeader Header;
        public CfEventKind Kind;
        public CfEventValue As;
    }

    [StructLayout(LayoutKind.Sequential)]
    public struct CfStats
    {
        public CfHeader Header;
        public ulong FramesNew, FramesRepeated, FramesSkipped, FramesLate, NotReady, LeasesLost, EventsPushed,
            EventsRefused, Generations, Acquires;
        public long AcquireLastNs, AcquireLongestNs, AcquireTotalNs;
    }

    public static class Native
    {
        public const uint VersionMajor = 1;
        const string Library = "cfengine_client";
        const CallingConvention C = CallingConvention.Cdecl;

        [DllImport(Library, CallingConvention = C)]
        public static extern IntPtr cf_last_error();
        [DllImport(Library, CallingConvention = C)]
        public static extern CfResult cf_get_version(uint major, ref CfVersion version);
        [DllImport(Library, CallingConvention = C)]
        public static extern long cf_now_ns();
        [DllImport(Library, CallingConvention = C)]
        public static extern CfResult cf_session_open(ref CfSessionInfo info, out IntPtr session);
        [DllImport(Library, CallingConvention = C)]
        public static extern CfResult cf_session_close(IntPtr session);
        [DllImport(Library, CallingConvention = C)]
        public static extern CfResult cf_session_poll_state(IntPtr session, ref CfSessionState state);
        [DllImport(Library, CallingConvention = C)]
        public static extern CfResult cf_frame_acquire(IntPtr session, ref CfAcquireInfo info, ref CfFrame frame);
        [DllImport(Library, CallingConvention = C)]
        public static extern CfResult cf_frame_release(IntPtr session, ulong frameId);
        [DllImport(Library, CallingConvention = C)]
        public static extern CfResult cf_session_device_memory(IntPtr session, ref CfDeviceMemory memory);
        [DllImport(Library, CallingConvention = C)]
        public static extern CfResult cf_session_push(IntPtr session, ref CfEvent what, out ulong eventId);
        [DllImport(Library, CallingConvention = C)]
        public static extern CfResult cf_stats_get(IntPtr session, ref CfStats stats);
    }
}
