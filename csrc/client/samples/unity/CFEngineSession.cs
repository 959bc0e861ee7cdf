// A session on a ring, over CFEngineClient.cs. Only prompts, error texts and Open allocate.
using System;
using System.Runtime.InteropServices;
using System.Text;

namespace CFEngine
{
    /// <summary>A reader of one ring. One thread at a time, as cfengine_client.h says.</summary>
    public sealed class CfSession : IDisposable
    {
        IntPtr handle;
        CfAcquireInfo when = new CfAcquireInfo { Header = CfHeader.Of<CfAcquireInfo>(CfStructType.AcquireInfo) };
        readonly CfHeader frameHeader = CfHeader.Of<CfFrame>(CfStructType.Frame);
        readonly CfHeader stateHeader = CfHeader.Of<CfSessionState>(CfStructType.SessionState);
        readonly CfHeader eventHeader = CfHeader.Of<CfEvent>(CfStructType.Event);
        readonly CfHeader statsHeader = CfHeader.Of<CfStats>(CfStructType.Stats);

        CfSession(IntPtr handle) { this.handle = handle; }

        /// <summary>The sentence about this thread's last failure.</summary>
        public static string LastError
        {
            get
            {
                IntPtr text = Native.cf_last_error();
                int length = 0;
                while (Marshal.ReadByte(text, length) != 0) ++length;
                var bytes = new byte[length];
                Marshal.Copy(text, bytes, 0, length);
                return Encoding.UTF8.GetString(bytes);
            }
        }

        /// <summary>Null and the reason where there is no such ring; try again later on ErrorNotFound.</summary>
        public static CfSession Open(string name, out CfResult result)
        {
            if (IntPtr.Size != 8)
                throw new PlatformNotSupportedException(
                    "pointers have 4 bytes, but this binding needs 8; build for 64 bits");
            var version = new CfVersion { Header = CfHeader.Of<CfVersion>(CfStructType.Version) };
            result = Native.cf_get_version(Native.VersionMajor, ref version);
            if (result < 0) return null;
            byte[] utf8 = Encoding.UTF8.GetBytes(name + "\0");
            GCHandle pin = GCHandle.Alloc(utf8, GCHandleType.Pinned);
            try
            {
                var info = new CfSessionInfo
                {
                    Header = CfHeader.Of<CfSessionInfo>(CfStructType.SessionInfo), Name = pin.AddrOfPinnedObject()
                };
                result = Native.cf_session_open(ref info, out IntPtr session);
                return result < 0 ? null : new CfSession(session);
            }
            finally
            {
                pin.Free();
            }
        }

        /// <summary>Pin the frame for `displayTimeNs` (0: now). Never waits. Release it when this is true.</summary>
        public bool TryAcquire(long displayTimeNs, CfPolicy policy, ref CfFrame frame)
        {
            when.DisplayTimeNs = displayTimeNs;
            when.Policy = policy;
            frame.Header = frameHeader;
            return Native.cf_frame_acquire(handle, ref when, ref frame) == CfResult.Success;
        }

        /// <summary>False: the writer took the frame back while it was read; do not show it.</summary>
        public bool Release(ref CfFrame frame) { return Native.cf_frame_release(handle, frame.Id) == CfResult.Success; }

        public CfResult PollState(ref CfSessionState state)
        {
            state.Header = stateHeader;
            return Native.cf_session_poll_state(handle, ref state);
        }

        public CfResult GetStats(ref CfStats stats)
        {
            stats.Header = statsHeader;
            return Native.cf_stats_get(handle, ref stats);
        }

        /// <summary>Queue an event whose Kind and As are set.</summary>
        public CfResult Push(ref CfEvent what, out ulong id)
        {
            what.Header = eventHeader;
            return Native.cf_session_push(handle, ref what, out id);
        }

        /// <summary>Pause, Resume or Reset.</summary>
        public CfResult Push(CfEventKind kind, out ulong id)
        {
            var what = new CfEvent { Kind = kind };
            return Push(ref what, out id);
        }

        public CfResult PushAction(uint code, double value, out ulong id)
        {
            var what = new CfEvent { Kind = CfEventKind.Action };
            what.As.Action = new CfAction { Code = code, Value = value };
            return Push(ref what, out id);
        }

        public CfResult PushPrompt(string text, out ulong id)
        {
            byte[] utf8 = Encoding.UTF8.GetBytes(text);
            GCHandle pin = GCHandle.Alloc(utf8, GCHandleType.Pinned);
            try
            {
                var what = new CfEvent { Kind = CfEventKind.Prompt };
                what.As.Prompt = new CfPrompt { Utf8 = pin.AddrOfPinnedObject(), Bytes = (uint)utf8.Length };
                return Push(ref what, out id);
            }
            finally
            {
                pin.Free();
            }
        }

        public void Dispose()
        {
            Native.cf_session_close(handle);
            handle = IntPtr.Zero;
        }
    }
}
